"DiCLIP: a frozen diffusion model sharpens a frozen CLIP for weakly supervised semantic segmentation."
__version__ = "0.1.0"


def __getattr__(name):
    "The facade loads its heavy libraries when it is asked for, so that `import diclip` stays quick."
    if name == "DiCLIP":
        from diclip.model import DiCLIP
        return DiCLIP
    if name in ("acr", "cache", "cam", "clip", "config", "data", "labels", "metrics", "model", "retrieval", "sd", "vce", "world"):
        from importlib import import_module
        return import_module(f"diclip.{name}")
    raise AttributeError(f"module 'diclip' has no attribute {name!r}")
