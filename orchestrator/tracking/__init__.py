"""Show the ledger in MLflow.

`facts` reads the ledger, `runs` (with `statuses`, `curves`, `mlflow_text`) says what each run should show, `sync` brings MLflow up to date
through `client`, `follow` does so beside a launch. `ui` serves MLflow's pages.
"""
