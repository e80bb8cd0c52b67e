"""Tools of the project's own developers; in no wheel and in no image. Imports `securevllm.catalogue` at most."""
