"""Files that lie elsewhere: on a web server, in an object store, on the Hugging Face hub.

What needs fsspec, aiohttp or huggingface_hub imports it when an address is opened, never before.
"""

from weightvid.remote.address import file_name, is_url, shown
from weightvid.remote.file import open_remote

__all__ = ["file_name", "is_url", "open_remote", "shown"]
