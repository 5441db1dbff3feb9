"""Settings, YAML files, the command line, and their mistakes."""
