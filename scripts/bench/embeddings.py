"""WordLlama's embeddings behind OpenAI's interface, for LiteLLM's auto-router in scripts/bench/serving.py.

They cost next to nothing, so what the auto-router takes is what LiteLLM takes.
"""

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from wordllama import WordLlama

model = WordLlama.load(disable_download=True)


async def embeddings(request: Request) -> JSONResponse:
    """Embeddings of a text, or of several; none, to a GET."""
    texts = (await request.json())["input"] if request.method == "POST" else []
    rows = model.embed(texts).tolist() if texts else []
    data = [{"object": "embedding", "index": n, "embedding": row} for n, row in enumerate(rows)]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    return JSONResponse({"object": "list", "model": "wordllama", "data": data, "usage": usage})


if __name__ == "__main__":
    routes = [Route("/v1/embeddings", embeddings, methods=["GET", "POST"])]
    uvicorn.run(Starlette(routes=routes), host="127.0.0.1", port=8092)
