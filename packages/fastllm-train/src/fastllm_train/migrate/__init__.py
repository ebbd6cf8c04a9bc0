"""Configs from the launch scripts of other trainers."""
