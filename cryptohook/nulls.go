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
	if err != nil {
		return nil, err
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
