package cryptohook

import (
	"bufio"
	"io"
	"net/http"
	"strings"
)

// WithoutNulls keeps answers that are the JSON null from mautrix 0.31, which ends the process at one: whatever stands before a homeserver
// may give it. They become answers that cannot be parsed. [Install] does it for the client; use it for what is asked before that, as a
// login.
func WithoutNulls(base http.RoundTripper) http.RoundTripper {
	if base == nil {
		base = http.DefaultTransport
	}
	if _, already := base.(withoutNullAnswers); already {
		return base
	}
	return withoutNullAnswers{base}
}

type withoutNullAnswers struct{ base http.RoundTripper }

// instead is JSON, and nothing that a client could take for an answer.
const instead = `"the answer was null"`

// RoundTrip implements [http.RoundTripper].
func (t withoutNullAnswers) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := t.base.RoundTrip(req)
	if err != nil || isFile(req, resp) {
		return resp, err
	}
	body := bufio.NewReader(resp.Body)
	read := io.Reader(body)
	if beginsNull(body) {
		read = strings.NewReader(instead)
		resp.ContentLength = int64(len(instead))
	}
	resp.Body = struct {
		io.Reader
		io.Closer
	}{read, resp.Body}
	return resp, nil
}

// isFile says that an answer is a file that was asked for: any bytes, of which none may be changed.
// https://spec.matrix.org/v1.16/client-server-api/#get_matrixclientv1mediadownloadservernamemediaid
func isFile(req *http.Request, resp *http.Response) bool {
	path := req.URL.EscapedPath() // what is put into a path has no slashes of its own
	download := strings.Contains(path, "/_matrix/client/v1/media/download/") || strings.Contains(path, "/_matrix/media/v3/download/")
	return download && resp.StatusCode == http.StatusOK
}

// beginsNull reads the white space before a JSON value. Of those only null begins with an n. An error of the body shows again to whoever
// reads on.
func beginsNull(body *bufio.Reader) bool {
	for {
		switch next, err := body.Peek(1); {
		case err != nil:
			return false
		case strings.IndexByte(" \t\r\n", next[0]) < 0:
			return next[0] == 'n'
		}
		_, _ = body.Discard(1)
	}
}
