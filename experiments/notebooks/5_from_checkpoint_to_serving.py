# %% [markdown]
# # 5. From a checkpoint to a packed export, and serving
#
# One model from float weights to a program that answers over HTTP, in three calls: quantize, load, convert. The model
# is stories260k, a Llama so small that this page takes seconds; a name like `smollm2-135m` in its place works the
# same.

# %%
import json
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import calib
from model_zoo import load_model

torch.set_num_threads(1)
source = Path("../../../shared/models/stories260k")
work = Path(tempfile.mkdtemp())
result = calib.quantize(
    source, "w8a8-static", "os+", "self", work / "w8", samples=32, seq_len=128, batch_size=8, progress=False
)
quality = result.report["quality"]
print(f"perplexity {quality['float']:.3f} -> {quality['quantized']:.3f} on {quality['rows']} held-out windows")
print(f"verified in a fresh process: within {result.report['verify']['max_difference']:.1e} of the logit range")

# %% [markdown]
# **What was written.** Integer codes and scales in safetensors, the recipe, hashes, and a report to read.

# %%
for file in sorted((work / "w8").iterdir()):
    print(f"{file.stat().st_size / 1024:8.1f} KiB  {file.name}")

# %% [markdown]
# **Which layers suffered?** The signal-to-noise ratio of each linear's output, in decibels: 20 more is ten times less
# error.

# %%
sqnr = result.report["linears"]
kinds = sorted({name.split(".", 3)[3] for name in sqnr})
fig, ax = plt.subplots(figsize=(8, 3))
for kind in kinds:
    ax.plot([db for name, db in sqnr.items() if name.endswith(kind)], "o-", label=kind)
ax.set(xlabel="block", ylabel="SQNR of the output, dB")
ax.set_xticks(range(5))
ax.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% [markdown]
# **Load and write.** `calib.load` runs the packed weights on integer kernels. Greedy continuations of the float and
# of the packed model, side by side:

# %%
packed, tokenizer = calib.load(work / "w8"), calib.load_tokenizer(work / "w8")
original, _ = load_model(source, progress=False)
prompt = tokenizer("Once upon a time, there was a little", return_tensors="pt")
for label, model in (("float", original), ("packed", packed)):
    with torch.no_grad():
        ids = model.generate(prompt["input_ids"], max_new_tokens=40, do_sample=False)[0]
    print(f"{label:7s}{tokenizer.decode(ids, skip_special_tokens=True)}\n")

# %% [markdown]
# **For another program.** The finished checkpoint becomes plain floats (or `gptq`, `awq`, `gguf`, `onnx` where the
# recipe can be said in them), verified with that format's own loader. Plain floats have no place for the grids of the
# inputs, so `weights_only` says to leave those behind.

# %%
report = calib.convert(work / "w8", "float", work / "float", weights_only=True)
print(f"format float: {report}")

# %% [markdown]
# **Serve it.** Twenty lines of the standard library; any server that calls `generate` does the same.


# %%
class Stories(BaseHTTPRequestHandler):
    def do_POST(self):
        text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = packed.generate(ids, max_new_tokens=24, do_sample=False)[0]
        body = json.dumps({"text": tokenizer.decode(out, skip_special_tokens=True)}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = HTTPServer(("127.0.0.1", 0), Stories)
threading.Thread(target=server.serve_forever, daemon=True).start()
request = urllib.request.Request(
    f"http://127.0.0.1:{server.server_port}", data=json.dumps({"prompt": "Lily and Tom went to the"}).encode()
)
with urllib.request.urlopen(request) as answer:
    print(json.loads(answer.read())["text"])
server.shutdown()
