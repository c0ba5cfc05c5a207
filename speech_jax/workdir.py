"""stand-in"""
import json, pathlib, contextlib
from speech_jax import files, config as defaults
class Workdir:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder).expanduser().absolute()
        self.checkpoints = self.folder/"checkpoints"; self.metrics=self.folder/"metrics.jsonl"; self.tensorboard=self.folder/"tensorboard"; self.robustness=self.folder/"robustness.json"
    def locked(self): return contextlib.nullcontext()
    def check(self, config): pass
    def prepare(self, splits): self.folder.mkdir(parents=True, exist_ok=True)
    def record(self, config): files.write_atomically(self.folder/"config.json", files.dump_json(files.plain(config)))
    def recorded(self): return defaults.completed(files.read_json(self.folder/"config.json"), "config.json")
    def record_plan(self, *a): pass
    def recorded_plan(self): return None
    def predictions(self, split): return self.folder/"predictions"/f"{split}.jsonl"
    def write_results(self, splits, **others):
        p=self.folder/"results.json"; r=json.loads(p.read_text()) if p.exists() else {"splits":{}}
        r["splits"].update(splits); r.update(others); files.write_atomically(p, files.dump_json(r)); return r
