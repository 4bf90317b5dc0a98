"""From a reference to verified files on disk: names, revisions, hashes, the Hub, the store and the lock.

The registry knows no model and never executes what it fetched. It imports neither `lora_rt.core` nor
`lora_rt.plugins`; whatever those know arrives as plain values.

    Reference.parse("org/repo@v1")        reference.py    what was typed
    Registry().resolve(reference)         registry.py     where it is: project, store, shipped, plugin sources, Hub
    Store().publish(...)                  store.py        how files become an installed adapter, whole or not at all
    inspect_adapter(folder, ...)          inspection/     untrusted files in, verified facts out
"""
