#!/usr/bin/env bash
# torchmetrics 1.9.0: `metric.half()` and `metric.bfloat16()` leave the state as it is, as documented ("prevent dtype
# casting"); `metric.to(torch.bfloat16)` casts it all the same, and a SumMetric that counts by fours stops at 1,024.
# Lightning's precision="bf16-true" and "16-true" call module.to(dtype), and so cast every metric of a LightningModule.
#
# Seen with torch 2.13.0 and torchmetrics 1.9.0, Python 3.11, for 2,000 images counted 4 at a time:
#   bfloat16()      torch.float32 2000.0
#   to(bfloat16)    torch.bfloat16 1024.0
#   to(float16)     torch.float16 2000.0
#   20,000 images, to(float16): 8192.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchmetrics==1.9.0
cat > "$folder/count.py" <<'P'
import torch
from torchmetrics import SumMetric


def count(cast, images):
    metric = cast(SumMetric())
    for _ in range(images // 4):
        metric.update(4)
    return f"{metric.sum_value.dtype} {metric.compute().item()}"


print("bfloat16()     ", count(lambda metric: metric.bfloat16(), 2000))
print("to(bfloat16)   ", count(lambda metric: metric.to(torch.bfloat16), 2000))
print("to(float16)    ", count(lambda metric: metric.to(torch.float16), 2000))
print("20,000 images, to(float16):", count(lambda metric: metric.to(torch.float16), 20000).split()[1])
P
"$folder/venv/bin/python" "$folder/count.py" | tee "$folder/seen"
diff <(sed -n 's/^#   //p' "$0") "$folder/seen"
echo "as described"
