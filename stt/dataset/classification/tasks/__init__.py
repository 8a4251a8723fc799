"""One classification task is one file here."""
