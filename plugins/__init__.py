"""How to write a mode: one module, one entry point.

A mode decides what an adapter is trained for, where it acts and how it is weighted. It is a module with
`LORA_RT_API = 1` and any of these hooks (types and details in `lora_rt.plugins.contract`):

    from lora_rt.plugins.contract import Gate, hookimpl

    LORA_RT_API = 1

    @hookimpl
    def lora_rt_objective(context): ...   # training: an Objective (examples -> tokens and labels, loss, extra state)

    @hookimpl
    def lora_rt_gate(context): ...        # each forward pass: a Gate, or None for "always 1"

    @hookimpl
    def lora_rt_joint_gate(context): ...  # the same for all adapters of the mode at once: gates among them

    @hookimpl
    def lora_rt_mixture(context): ...     # tune: what is fitted of a composition whose adapters this mode gates

    @hookimpl
    def lora_rt_scene(context): ...       # each request: the scene types of its prompts, where nobody said

    @hookimpl
    def lora_rt_compose(context): ...     # each row of a request: the weights of this mode's terms

    @hookimpl
    def lora_rt_static(context): ...      # export: why an adapter can't be constant weights, "" where it can

    @hookimpl
    def lora_rt_commands(app, services): ...   # subcommands of lora-rt (app is a typer.Typer)

    @hookimpl
    def lora_rt_sources(register): ...    # further places where adapters are found by name

Your package names the module in its pyproject.toml; the entry point's name is the mode's name:

    [project.entry-points."lora_rt.modes"]
    fade-in = "my_package.fade_in"

`lora-rt install` it, and `lora-rt plugins` lists it, with the first line of the module's docstring to say what it is
for. What is not a mode, and has the last two hooks alone, goes into the group "lora_rt.plugins" instead. A plugin is
imported when an adapter of its mode, or its command, is asked for: name the command as the entry point, and no other
plugin is imported to find it.

A mode imports `lora_rt.plugins.contract` and nothing else of ours: all that it needs of the runtime arrives in its
hook's context, and what its commands need in `services`. It imports torch inside its hooks, since `lora-rt --help`
imports every plugin, or in a module of its own that they import. Its own options (`--option tokens=24`) are read with
`read_options`; a mistake of the user is raised as a `LoraRtError`, which passes through as it is. One line tests it:
see `lora_rt.plugins.testing`. A whole package of two files is in `examples/fade-in-mode`.

A plugin that fails is named, with the reason, by `lora-rt plugins` and `lora-rt doctor`; the host and the other plugins
go on. Imports and all hooks but the gate are given up after a time limit (`LORA_RT_PLUGIN_SECONDS` sets another one).
`LORA_RT_BLOCK_PLUGINS=fade-in,other` keeps plugins from being imported at all.
"""
