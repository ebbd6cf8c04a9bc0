# FASTLLM_CUTLASS_SOURCE: the folder that holds CUTLASS's include/ and examples/, or empty, and its
# FASTLLM_CUTLASS_VERSION. Taken from CUTLASS_DIR (a checkout of https://github.com/NVIDIA/cutlass),
# else from the wheel nvidia-cutlass of the Python that is first on PATH.
set(CUTLASS_DIR "$ENV{CUTLASS_DIR}" CACHE PATH "CUTLASS: the folder with include/cutlass")
set(FASTLLM_CUTLASS_SOURCE "")
if(CUTLASS_DIR)
    if(NOT EXISTS "${CUTLASS_DIR}/include/cutlass/cutlass.h")
        fastllm_fail(
            "CUTLASS_DIR=${CUTLASS_DIR} has no include/cutlass/cutlass.h"
            "set it to a checkout of https://github.com/NVIDIA/cutlass, or leave it empty for the wheel nvidia-cutlass"
        )
    endif()
    set(FASTLLM_CUTLASS_SOURCE "${CUTLASS_DIR}")
else()
    find_program(FASTLLM_PYTHON python3)
    # -I: pip builds in an environment of its own, which hides what is installed from other Pythons.
    execute_process(
        COMMAND
            "${FASTLLM_PYTHON}" -I -c
            "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
        OUTPUT_VARIABLE _cutlass_library
        OUTPUT_STRIP_TRAILING_WHITESPACE
        ERROR_QUIET
    )
    set(_wheel "${_cutlass_library}/source")
    if(EXISTS "${_wheel}/include/cutlass/cutlass.h")
        set(FASTLLM_CUTLASS_SOURCE "${_wheel}")
    endif()
endif()
if(FASTLLM_CUTLASS_SOURCE)
    file(STRINGS "${FASTLLM_CUTLASS_SOURCE}/include/cutlass/version.h" _lines REGEX "^#define CUTLASS_(MAJOR|MINOR|PATCH) ")
    string(REGEX REPLACE "[^0-9;]" "" FASTLLM_CUTLASS_VERSION "${_lines}")
    string(REPLACE ";" "." FASTLLM_CUTLASS_VERSION "${FASTLLM_CUTLASS_VERSION}")
endif()
message(STATUS "fastllm: CUTLASS ${FASTLLM_CUTLASS_VERSION} ${FASTLLM_CUTLASS_SOURCE}")

# fastllm_add_gemm(<target>): the library of GEMMs, one instance a file. NDEBUG: a device assert would
# put a call into the kernels, which serialises their tensor instructions (ptxas C7510).
function(fastllm_add_gemm target)
    file(GLOB sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/src/cuda/gemm/*.cu")
    add_library(${target} STATIC EXCLUDE_FROM_ALL ${sources})
    target_link_libraries(${target} PUBLIC fastllm_ops)
    target_include_directories(
        ${target} SYSTEM
        PRIVATE
            "${FASTLLM_CUTLASS_SOURCE}/include"
            "${FASTLLM_CUTLASS_SOURCE}/examples/45_dual_gemm"
            "${FASTLLM_CUTLASS_SOURCE}/examples"
    )
    target_compile_definitions(${target} PRIVATE NDEBUG)
    target_compile_options(${target} PRIVATE --expt-relaxed-constexpr)
endfunction()
