"""The built-in modes keep to what every mode has to hold."""

from lora_rt.plugins.testing import conformance

TestOutputOnly = conformance("output-only")
