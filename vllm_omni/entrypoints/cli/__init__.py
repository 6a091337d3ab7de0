"""The command line ``vllm-omni``: one module a command, loaded when it is asked for."""
