"""Tables of texts: read them, split them, and batches of the arrays that they become.

    tables = splits("reviews.csv", text="review", label="stars")        # or a folder, "hub:imdb", "builtin"
    labels = label_names(tables["train"])
    arrays = encode(tables["train"], tokenizer, labels=labels, max_length=128)
    ds = batches(arrays, 32, seed=0)                                    # ds[step] is batch number `step`

Nothing here depends on the order of rows, of files or of dictionaries, nor on the process: the same data and seed give
the same batches everywhere.
"""

from .batching import batch_rows as batch_rows
from .batching import batches as batches
from .batching import eval_batches as eval_batches
from .batching import steps_per_epoch as steps_per_epoch
from .encoding import encode as encode
from .sources import fingerprint as fingerprint
from .sources import split_table as split_table
from .sources import splits as splits
from .tables import Table as Table
from .tables import label_names as label_names
from .tables import read as read
