"""The digits with labels dropped in training, for classifier-free guidance (docs/sampling.md).

python main.py --mode=train --config=configs/digits_guided.py --workdir=workdirs/guided
python main.py --mode=sample --workdir=workdirs/guided --out=grid.png --class_id=all --seeds=0-99 \
    --config.guidance.name=classifier_free --config.guidance.scale=2

1,045,261 parameters, minutes on two CPU cores. Not yet measured here.
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    """`digits`, which sees a tenth of the images without their label, and keeps early checkpoints."""
    config = digits.get_config()
    config.model.label_dropout = 0.1
    config.train.keep = 8  # the first ones can guide the last
    return config
