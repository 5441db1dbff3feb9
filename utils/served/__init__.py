"""A teacher behind a server, which is asked over HTTP for the probabilities of a text's tokens.

http_client  one server: requests at a time, retries, an outage that is waited for, and a key that nobody gets to see
protocols    vLLM's and SGLang's requests and answers, recognised; llama.cpp and Ollama refused
checks       the server against tokenizer, length and top-k of a run
teacher      ListServer: the lists of windows, asked for ahead; its connection and its identity
"""
