# The version is written once, in pyproject.toml.
file(STRINGS "${CMAKE_CURRENT_LIST_DIR}/../pyproject.toml" _version_line REGEX "^version = " LIMIT_COUNT 1)
if(NOT _version_line MATCHES "\"([0-9]+\\.[0-9]+\\.[0-9]+)\"")
    message(FATAL_ERROR "pyproject.toml has no line of the form: version = \"1.2.3\"")
endif()
set(FASTLLM_VERSION "${CMAKE_MATCH_1}")
