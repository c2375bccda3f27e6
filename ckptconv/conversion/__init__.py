"""The main job: a file becomes a diffusers folder, and a folder becomes a file again."""
