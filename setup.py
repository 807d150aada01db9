"""Builds the CPU's passes. Without a C++ compiler the package installs all the same, and uses ATen's operators."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "syncbn.ops._native",
            ["src/syncbn/ops/native.cpp"],
            language="c++",
            extra_compile_args=["-std=c++17", "-O3", "-fno-math-errno", "-fopenmp"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
