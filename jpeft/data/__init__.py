"""Tables of texts: reading, splitting, encoding as arrays, and batches of the arrays.

    tables = splits("reviews.csv", text="review", label="stars")        # or a folder, "hub:imdb", "builtin"
    labels = label_names(tables["train"])
    arrays = encode(tables["train"], tokenizer, labels=labels, max_length=128)
    ds = batches(arrays, 32, seed=0)                                    # ds[step] is batch number `step`

Nothing here depends on the order of rows, of files or of dictionaries, nor on the process: the same data and seed give the same batches
everywhere.
"""

from jpeft.data.batching import batch_rows as batch_rows
from jpeft.data.batching import batches as batches
from jpeft.data.batching import eval_batches as eval_batches
from jpeft.data.batching import steps_per_epoch as steps_per_epoch
from jpeft.data.encoding import encode as encode
from jpeft.data.reading import read as read
from jpeft.data.sources import fingerprint as fingerprint
from jpeft.data.sources import split_table as split_table
from jpeft.data.sources import splits as splits
from jpeft.data.tables import Table as Table
from jpeft.data.tables import label_names as label_names
