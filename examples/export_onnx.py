"""
Export a saved classifier to ONNX, and compare both runtimes on the CPU.

    python examples/export_onnx.py --model out --output student.onnx

The same as `iekd-hf export`; --help lists the arguments. Needs pip install "iekd_hf[onnx]".
"""

from iekd_hf.commands.export import main


if __name__ == "__main__":
    main()
