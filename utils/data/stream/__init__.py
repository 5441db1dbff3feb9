"""Text that is larger than memory: read, cleaned and cut into windows block by block, while the block before trains.

    sources --reader--> documents --text--> cleaned ones --blocks--> tables of windows on disk --batches--> steps

- `recent`: texts that were seen of late, in fixed memory
- `reader`: documents of one source, pass after pass, from any of them on
- `text`: documents of all sources, mixed and cleaned
- `beginning`: documents to measure on, and an example of those to learn from
- `packing`: documents -> windows in a file, in this process or in workers
- `blocks`: blocks of windows on disk, the next one made ahead
- `batches`: steps of a run, block after block
"""
