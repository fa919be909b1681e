"""The forms in which files hold comparisons, a module each; `rlhf_env.preferences.comparisons.FORMATS` lists them."""
