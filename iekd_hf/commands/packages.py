"""Optional packages: which extra installs them."""

import importlib.util


# Packages that are imported by another name than they are installed by.
_INSTALLED_AS = {"sklearn": "scikit-learn"}


def require(extra: str, *modules: str) -> None:
    """End the command with one sentence where a module that an extra installs is missing."""
    missing = [_INSTALLED_AS.get(name, name) for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"Expected {' and '.join(missing)} to be installed, as this command needs, got none of it: run "
            f'pip install "iekd_hf[{extra}]".'
        )
