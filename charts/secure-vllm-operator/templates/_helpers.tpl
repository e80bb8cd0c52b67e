{{- define "svllm.chart-name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{/* Name of every object; a release that is called like the chart does not say it twice. */}}
{{- define "svllm.name" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "svllm.chart-name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
Labels that select the operator's pods. The first is fixed: the gateways' policies let pods with it read the revision
that is served.
*/}}
{{- define "svllm.selector" -}}
app.kubernetes.io/name: secure-vllm-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "svllm.labels" -}}
{{ include "svllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: secure-vllm-operator
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "svllm.service-account" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "svllm.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name: without serviceAccount.create, name the account that exists" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* The name carries the scope, as the operator computes it (settings.py). */}}
{{- define "svllm.lease" -}}
secure-vllm-operator{{ with .Values.watchNamespace }}-{{ . }}{{ end }}
{{- end -}}

{{/* Two scopes in one namespace have roles of their own for their Leases. */}}
{{- define "svllm.lease-role" -}}
{{ include "svllm.name" . }}{{ with .Values.watchNamespace }}-{{ . }}{{ end }}-lease
{{- end -}}

{{- define "svllm.user" -}}
{{- printf "system:serviceaccount:%s:%s" .Release.Namespace (include "svllm.service-account" .) -}}
{{- end -}}

{{- define "svllm.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Arguments of `securevllm run`: only what differs from its own defaults. */}}
{{- define "svllm.arguments" -}}
{{- $pods := list -}}
{{- $arguments := list "run" -}}
{{- with .Values.watchNamespace }}{{- $arguments = append $arguments (printf "--namespace=%s" .) -}}{{- end -}}
{{- with .Values.docsUrl }}{{- $arguments = append $arguments (printf "--docs-url=%s" (trimSuffix "/" .)) -}}{{- end -}}
{{- range .Values.takeOver }}{{- $arguments = append $arguments (printf "--take-over=%s" .) -}}{{- end -}}
{{- if ne .Values.cluster.domain "cluster.local" }}{{- $arguments = append $arguments (printf "--cluster-domain=%s" .Values.cluster.domain) -}}{{- end -}}
{{- range .Values.cluster.ranges }}{{- $arguments = append $arguments (printf "--cluster-range=%s" .) -}}{{- end -}}
{{- range .Values.dns.peers -}}
{{- if .cidr -}}
{{- $arguments = append $arguments (printf "--dns-cidr=%s" .cidr) -}}
{{- else -}}
{{- $pods = append $pods . -}}
{{- end -}}
{{- end -}}
{{- if ne (len $pods) 1 -}}
{{- fail (printf "dns.peers: exactly one entry names pods (namespace and podLabel), not %d; the others are {cidr: ...}" (len $pods)) -}}
{{- end -}}
{{- with first $pods -}}
{{- if ne .namespace "kube-system" }}{{- $arguments = append $arguments (printf "--dns-namespace=%s" .namespace) -}}{{- end -}}
{{- if ne .podLabel "k8s-app=kube-dns" }}{{- $arguments = append $arguments (printf "--dns-pods=%s" .podLabel) -}}{{- end -}}
{{- end -}}
{{- if ne (int .Values.dns.port) 53 }}{{- $arguments = append $arguments (printf "--dns-port=%d" (int .Values.dns.port)) -}}{{- end -}}
{{- $canary := printf "%s-canary" (include "svllm.name" .) -}}
{{- if ne $canary "secure-vllm-operator-canary" }}{{- $arguments = append $arguments (printf "--canary-service=%s" $canary) -}}{{- end -}}
{{- with .Values.gateway.image }}{{- $arguments = append $arguments (printf "--gateway-image=%s" .) -}}{{- end -}}
{{- if ne .Values.log.format "json" }}{{- $arguments = append $arguments (printf "--log-format=%s" .Values.log.format) -}}{{- end -}}
{{- if ne .Values.log.level "INFO" }}{{- $arguments = append $arguments (printf "--log-level=%s" .Values.log.level) -}}{{- end -}}
{{- if ne (int .Values.workers) 8 }}{{- $arguments = append $arguments (printf "--workers=%d" (int .Values.workers)) -}}{{- end -}}
{{- if ne (int .Values.resyncSeconds) 600 }}{{- $arguments = append $arguments (printf "--resync=%d" (int .Values.resyncSeconds)) -}}{{- end -}}
{{- if .Values.bounds }}{{- $arguments = append $arguments "--bounds=/etc/secure-vllm-operator/bounds.yaml" -}}{{- end -}}
{{- toYaml (concat $arguments .Values.extraArgs) -}}
{{- end -}}
