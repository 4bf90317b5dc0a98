"""`python -m lora_rt` is the same as `lora-rt`."""

from lora_rt.core.cli import main

if __name__ == "__main__":
    main()
