#!/bin/sh
# Prints the alerts of prometheus/rules.yml as a PrometheusRule. The operator takes the same text two columns to the right.
set -eu
cat <<END
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: cake-vllm
  labels: {app.kubernetes.io/name: cake-vllm}
spec:
END
sed 's/^/  /' "$(dirname "$0")/../prometheus/rules.yml"
