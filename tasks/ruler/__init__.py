"""RULER's 13 tasks (arXiv 2404.06654): synthetic prompts of any length, from passkeys to counting words."""
