"""The Hub, through huggingface_hub's client: its cache, its tokens, its retries, its offline mode.

    library.py      the library itself, imported when it is first used
    client.py       one guarded session; what its exceptions mean for a person, in one table
    limits.py       how long it may take to accept, to answer and to send on
    internals.py    what of the client is not public: our session in the place of the application's
    remote.py       what a repository holds at a commit: names, sizes, hashes
    download.py     files into a staging folder, verified
    pull.py         an adapter into the store, once
    upload.py       an adapter out of the store, with a card (model_card.py)
    search.py       what there is

The client checks a download's size, not its hash, and builds paths from headers that a server sends. So every hash is
checked here, and every header before the client sees it.
"""
