{{- define "cdc-embedder.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 63 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "cdc-embedder.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "cdc-embedder.labels" -}}
{{ include "cdc-embedder.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "cdc-embedder.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "%s-%s" .Chart.AppVersion (ternary "cuda" "cpu" .Values.gpu.enabled)) }}
{{- end }}

{{- define "cdc-embedder.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: ["ALL"]
{{- end }}

{{- /* What a pod needs with and without a GPU, and over it what is in .Values.resources. */ -}}
{{- define "cdc-embedder.resources" -}}
{{- $base := dict "requests" (dict "cpu" "1" "memory" "2Gi") "limits" (dict "memory" "4Gi") }}
{{- if .Values.gpu.enabled }}
{{- $limits := dict "memory" "16Gi" .Values.gpu.resource (toString .Values.gpu.count) }}
{{- $base = dict "requests" (dict "cpu" "2" "memory" "8Gi") "limits" $limits }}
{{- end }}
{{- toYaml (mergeOverwrite $base (deepCopy .Values.resources)) }}
{{- end }}
