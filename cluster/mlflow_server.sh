#!/bin/bash
# An MLflow server that jobs reach by MLFLOW_TRACKING_URI=http://HOST:5000
#
#   cluster/mlflow_server.sh                                                       SQLite, for one person
#   STORE=postgresql://USER:PASSWORD@HOST/mlflow ARTIFACTS=/shared/mlflow cluster/mlflow_server.sh      for a team
#
# HOST (default 127.0.0.1: nobody else reaches it), PORT (5000), STORE (sqlite:///mlflow.db), ARTIFACTS (./mlartifacts)
set -euo pipefail
# by the environment and not as an argument, which every user of the machine can read
export MLFLOW_BACKEND_STORE_URI=${STORE:-sqlite:///mlflow.db}
exec mlflow server --host "${HOST:-127.0.0.1}" --port "${PORT:-5000}" --workers "${WORKERS:-2}" \
  --artifacts-destination "${ARTIFACTS:-$PWD/mlartifacts}" --serve-artifacts \
  ${ALLOWED_HOSTS:+--allowed-hosts "$ALLOWED_HOSTS"}
