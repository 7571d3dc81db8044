"""Everything declarative is in pyproject.toml; compiled extensions (csrc/) are declared here."""

from setuptools import setup

setup()
