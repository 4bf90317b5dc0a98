"""The systems that are compared: one file each, one small interface (`lora_rt.core.benchmark.systems.system`)."""
