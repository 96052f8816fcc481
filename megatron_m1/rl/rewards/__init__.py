"""Verifiable rewards in killable processes. Import the modules: this file stays empty so that workers start fast."""
