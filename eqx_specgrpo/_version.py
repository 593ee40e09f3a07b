import importlib.metadata


def package_version() -> str:
    """The installed version of this package; it may also be used from its source tree, without one."""
    try:
        return importlib.metadata.version("eqx_specgrpo")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
