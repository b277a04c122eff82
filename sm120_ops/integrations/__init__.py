"""Plugins of serving engines: entry points `vllm.general_plugins` and `sglang.srt.plugins`."""
