"""Types of the compiled extension. One section per file of cpp/bindings."""

from typing import Any

# build_info.cpp
def version() -> str: ...
def features() -> dict[str, Any]: ...
