"""An OpenAI-compatible endpoint over `ContinuousBatcher`, on FastAPI and uvicorn: `create_app`, and `run`."""

try:
    import fastapi
    import uvicorn
except ImportError as error:
    raise ImportError(f'the endpoint needs {error.name}: pip install "gptoss-opt[serve]".', name=error.name) from error

from .app import create_app
from .server import run

__all__ = ["create_app", "run"]
