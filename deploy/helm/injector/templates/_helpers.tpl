{{/* At most 46 characters: a CronJob's name, with its suffix, may have 52. */}}
{{- define "injector.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 46 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 46 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "injector.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "injector.priorityClass" -}}
{{- if .Values.priorityClass.create -}}
{{- printf "%s-edge" (include "injector.fullname" .) -}}
{{- else -}}
{{- .Values.priorityClass.name -}}
{{- end -}}
{{- end -}}

{{/* The edge nodes. A value replaces the default: Helm would merge two maps. */}}
{{- define "injector.nodeSelector" -}}
{{- toYaml (.Values.nodeSelector | default (dict "kubernetes.io/os" "linux" "node-role.kubernetes.io/edge" "")) -}}
{{- end -}}

{{/* A duration of the configuration, such as `1m 30s`, in seconds. */}}
{{- define "injector.seconds" -}}
{{- $seconds := 0 -}}
{{- range regexFindAll "[0-9]+(ms|s|m|h)" . -1 -}}
{{- $number := regexFind "^[0-9]+" . | int -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- $seconds = add $seconds (div (mul $number (get (dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000) $unit)) 1000) -}}
{{- end -}}
{{- $seconds -}}
{{- end -}}

{{/* What pods are selected by. */}}
{{- define "injector.selector" -}}
app.kubernetes.io/name: {{ include "injector.fullname" . }}
app.kubernetes.io/component: edge
{{- end -}}

{{/* A Role with which the injector reads endpoints and Services of one namespace, and its binding. */}}
{{- define "injector.reader" }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  name: {{ .name }}
  namespace: {{ .namespace }}
  labels: {{- include "injector.labels" .root | nindent 4 }}
rules:
  - apiGroups: ["discovery.k8s.io"]
    resources: ["endpointslices"]
    verbs: ["list", "watch"]
  - apiGroups: [""]
    resources: ["services"]
    verbs: ["list", "watch"]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .name }}
  namespace: {{ .namespace }}
  labels: {{- include "injector.labels" .root | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ include "injector.fullname" .root }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}

{{/* The pod that sends a message through the edge, for the CronJob and for `helm test`. */}}
{{- define "injector.probePod" -}}
restartPolicy: Never
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
containers:
  - name: probe
    image: {{ include "injector.image" . }}
    imagePullPolicy: {{ .Values.image.pullPolicy }}
    command: ["injector"]
    args:
      - probe
      - --smtp={{ .Values.probe.smtp | default (printf "%s.%s.svc.cluster.local:25" (include "injector.fullname" .) .Release.Namespace) }}
      - --imap={{ .Values.probe.imap }}
      - --tls-name={{ .Values.probe.tlsName }}
      - --user={{ .Values.probe.user }}
      - --password-file=/etc/injector-probe/password
      - --from={{ .Values.probe.from }}
      - --to={{ .Values.probe.to }}
      {{- with .Values.probe.pushgateway }}
      - --pushgateway={{ . }}
      {{- end }}
      {{- range .Values.probe.extraArgs }}
      - {{ . | quote }}
      {{- end }}
    securityContext:
      privileged: false
      allowPrivilegeEscalation: false
      readOnlyRootFilesystem: true
      capabilities:
        drop: ["ALL"]
    resources: {{- toYaml .Values.probe.resources | nindent 6 }}
    volumeMounts:
      - { name: password, mountPath: /etc/injector-probe, readOnly: true }
volumes:
  - name: password
    secret:
      secretName: {{ .Values.probe.secretName }}
      defaultMode: 288 # 0440
{{- end -}}

{{- define "injector.labels" -}}
app.kubernetes.io/name: {{ include "injector.fullname" . }}
{{ include "injector.releaseLabels" . }}
{{- end -}}

{{/* For objects that are not the injector's own. */}}
{{- define "injector.releaseLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}
