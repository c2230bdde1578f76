"""A model from the Hugging Face hub on your own GPU or TPU: LoRA in bfloat16 on movie reviews.

    pip install "jpeft[hf,hub,cuda]"
    python examples/hub_model.py --model FacebookAI/roberta-large --data hub:stanfordnlp/imdb --batch-size 32

Needs a network connection for the model and the data. The computation is in bfloat16; the parameters and the adapter stay float32. Blocks
are recomputed in the backward pass, so that 512 tokens by 32 reviews of RoBERTa-large fit into 24 GB. This is `jpeft train` called from
Python. Prints progress, the test metrics, and the folder of the run. Run the script again to resume after a crash.
"""

import argparse

import jax

from jpeft.training.config import TrainConfig
from jpeft.training.train import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="FacebookAI/roberta-large")
parser.add_argument("--data", default="hub:stanfordnlp/imdb")
parser.add_argument("--output", default="run-hub-model")
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--max-length", type=int, default=512)
parser.add_argument("--epochs", type=int, default=1)
args = parser.parse_args()

print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
result = train(
    TrainConfig(
        model=args.model,
        data=args.data,
        output=args.output,
        method="lora",
        options=("rank=16", "alpha=32"),
        learning_rate=4e-4,  # a larger model needs a smaller rate; the default is for small encoders
        batch_size=args.batch_size,
        max_length=args.max_length,
        epochs=args.epochs,
        dtype="bfloat16",
        remat=True,
        resume=True,
    )
)
print({name: round(value, 4) for name, value in result.test.items()})
print(f"{result.trained:,} parameters trained in {result.seconds:.0f} s; the adapter is in {result.path / 'adapter'}")
print(f"to use it: jpeft predict {result.path} --text '...'      to merge it: jpeft merge {result.path} merged/")
