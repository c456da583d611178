{{/* Names are fixed, not made from the release's: profiles, RoleBindings and other namespaces know them. One release a namespace. */}}

{{- define "osctl.labels" -}}
app.kubernetes.io/name: osctl
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: osctl
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{/* Labels of a pod, and what a selector looks for: (dict "root" $ "role" "mlflow"). */}}
{{- define "osctl.selector" -}}
app.kubernetes.io/name: osctl
app.kubernetes.io/instance: {{ .root.Release.Name }}
osctl/role: {{ .role }}
{{- end }}

{{/* An image that is pinned, or allowed by name: (dict "root" $ "image" REF "of" "mlflow.image"). */}}
{{- define "osctl.image" -}}
{{- if not (or (regexMatch "^[^@\\s]+@sha256:[0-9a-f]{64}$" .image) (has .image (.root.Values.profile.allow_unpinned | default list))) }}
{{- fail (printf "%s: image %q is not pinned; write name@sha256:<64 digits>, or name it under profile.allow_unpinned" .of .image) }}
{{- end }}
{{- .image }}
{{- end }}

{{- define "osctl.s3Endpoint" -}}
{{- if .Values.s3.trial.enabled -}}
http://osctl-s3.{{ .Release.Namespace }}.svc:7070
{{- else -}}
{{ .Values.profile.s3_endpoint }}
{{- end }}
{{- end }}

{{/* How a pod of ours finds the store; credentials by reference alone. */}}
{{- define "osctl.s3Env" -}}
- {name: AWS_REGION, value: {{ .Values.profile.s3_region | default "us-east-1" | quote }}}
{{- with include "osctl.s3Endpoint" . }}
- {name: OSCTL_S3_ENDPOINT, value: {{ . | quote }}}
- {name: MLFLOW_S3_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- with .Values.profile.s3_secret }}
- {name: AWS_ACCESS_KEY_ID, valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_ACCESS_KEY_ID}}}
- {name: AWS_SECRET_ACCESS_KEY, valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_SECRET_ACCESS_KEY}}}
- {name: AWS_SESSION_TOKEN, valueFrom: {secretKeyRef: {name: {{ . }}, key: AWS_SESSION_TOKEN, optional: true}}}
{{- end }}
{{- end }}

{{/* Pod Security "restricted", and a root file system that nobody writes to. */}}
{{- define "osctl.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext: {runAsNonRoot: true, runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000, seccompProfile: {type: RuntimeDefault}}
{{- with .Values.profile.image_pull_secrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "osctl.containerSecurity" -}}
securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
{{- end }}

{{/* A rule out to addresses: (dict "cidrs" LIST "ports" LIST "of" "network.s3"). 0.0.0.0/0 leaves out what is private, and where clouds hand out credentials. */}}
{{- define "osctl.egress" -}}
{{- if not .cidrs }}
{{- fail (printf "%s.cidrs: is empty, and the network policy would shut it off; give its addresses, e.g. [10.0.0.0/28]" .of) }}
{{- end }}
- to:
  {{- range .cidrs }}
  {{- if eq . "0.0.0.0/0" }}
  - ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8, 100.64.0.0/10, 169.254.0.0/16, 172.16.0.0/12, 192.168.0.0/16]}
  {{- else if regexMatch "^169\\.(254\\..*|.*/([89]|1[0-5]))$" . }}
  {{- fail (printf "%s.cidrs: %s holds 169.254.169.254, where clouds hand out the node's own credentials; no pod reaches it" $.of .) }}
  {{- else }}
  - ipBlock: {cidr: {{ . }}}
  {{- end }}
  {{- end }}
  ports:
  {{- range .ports }}
  - {protocol: TCP, port: {{ . }}}
  {{- end }}
{{- end }}

{{- define "osctl.s3Egress" -}}
{{- if .Values.s3.trial.enabled -}}
- to: [{podSelector: {matchLabels: {osctl/role: s3}}}]
  ports: [{protocol: TCP, port: 7070}]
{{- else }}
{{- include "osctl.egress" (dict "cidrs" .Values.network.s3.cidrs "ports" (list .Values.network.s3.port) "of" "network.s3") | trim }}
{{- end }}
{{- end }}
