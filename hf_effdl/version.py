"""The one place that holds the version, and the line that installs this package."""

__version__ = "0.2.0.dev0"
# The name is on no index yet. Cards carry this line; README and docs say the same.
INSTALL = "pip install git+https://github.com/hf-effdl/hf_effdl"
