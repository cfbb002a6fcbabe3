"""
Distil a semantic segmenter by inheritance and exploration.

    accelerate launch examples/run_iekd_segmentation.py \
        --teacher nvidia/segformer-b2-finetuned-ade-512-512 --student nvidia/mit-b0 \
        --dataset_name segments/sidewalk-semantic --output_dir out --push_to_hub

The same as `iekd-hf segment`; --help lists the arguments. Needs pip install "iekd_hf[cli]".
"""

from iekd_hf.commands.segment import main


if __name__ == "__main__":
    main()
