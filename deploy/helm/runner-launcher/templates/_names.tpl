{{- define "name" -}}
{{- if contains "runner-launcher" .Release.Name }}{{ .Release.Name | trunc 53 | trimSuffix "-" }}{{ else }}{{ printf "%s-runner-launcher" .Release.Name | trunc 53 | trimSuffix "-" }}{{ end -}}
{{- end -}}

{{- define "selector" -}}
app.kubernetes.io/name: runner-launcher
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "labels" -}}
{{ include "selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "serviceAccount" -}}
{{- .Values.serviceAccount.name | default (ternary (include "name" .) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "replicas" -}}
{{- $default := ternary 2 1 (ne .Values.database.secret "") -}}
{{- $replicas := kindIs "invalid" .Values.replicas | ternary $default .Values.replicas | int -}}
{{- if and (gt $replicas 1) (not .Values.database.secret) }}{{ fail "several replicas need PostgreSQL: set database.secret" }}{{ end -}}
{{- if and (gt $replicas 1) (not .Values.tokens.secret) }}{{ fail "several replicas need a token file: set tokens.secret" }}{{ end -}}
{{- $replicas -}}
{{- end -}}

{{- /* The namespaces that pools name, each once, as a JSON list. */ -}}
{{- define "namespaces" -}}
{{- $found := list -}}
{{- range $name, $pool := .Values.pools -}}
{{- if and (eq $pool.type "kubernetes") (not (dig "config" "kubeconfig" "" $pool)) }}{{ $found = append $found (dig "config" "namespace" "necrocode-agents" $pool) }}{{ end -}}
{{- end -}}
{{- $found | uniq | sortAlpha | toJson -}}
{{- end -}}
