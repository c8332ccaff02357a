# Licences of what is in the program

Made by `make licences` from what `go build -tags goolm .` links; a test fails when it is out of date. The program itself is under the
[Mozilla Public License 2.0](../LICENSE). Go's standard library, which is in it too, is under BSD-3-Clause, and SQLite's own code, which
go-sqlite3 contains, is in the public domain. What only tests need is not listed.

| library | version | licence |
|---|---|---|
{{ range . }}{{ if ne .Name "sendertrust" }}| {{ .Name }} | {{ .Version }} | {{ .LicenseName }} |
{{ end }}{{ end }}