package cryptohook

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"
)

// answering answers every request with the same.
type answering struct {
	status int
	body   []byte
}

func (a answering) RoundTrip(req *http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: a.status, Request: req, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(a.body))}, nil
}

func throughNulls(t *testing.T, path string, status int, body []byte) []byte {
	t.Helper()
	req := must(http.NewRequest(http.MethodGet, "http://server.test/"+path, nil))
	resp := must(WithoutNulls(answering{status, body}).RoundTrip(req))
	defer resp.Body.Close()
	return must(io.ReadAll(resp.Body))
}

// A file is any bytes: those of an encrypted one begin with an n, or with what is white space in JSON, in one of fifty cases.
func TestDownloadsAreLeftAsTheyAre(t *testing.T) {
	for first := range 256 {
		file := []byte{byte(first), ' ', 'n', 0}
		for _, path := range []string{"_matrix/client/v1/media/download/test/file", "behind/_matrix/media/v3/download/test/file"} {
			if got := throughNulls(t, path, http.StatusOK, file); !bytes.Equal(got, file) {
				t.Fatalf("%s: %q became %q", path, file, got)
			}
		}
	}
}

func TestAnswersOfNullAreReplaced(t *testing.T) {
	for path, status := range map[string]int{
		"_matrix/client/v3/sync": http.StatusOK, "_matrix/client/v3/rooms/%2F_matrix%2Fclient%2Fv1%2Fmedia%2Fdownload%2F/members": http.StatusOK,
		"_matrix/client/v1/media/download/test/file": http.StatusNotFound,
	} {
		if got := throughNulls(t, path, status, []byte(" \n null")); string(got) != instead {
			t.Errorf("%s: %q", path, got)
		}
		if got := throughNulls(t, path, status, []byte(`{"a":null}`)); !strings.HasPrefix(string(got), `{"a"`) {
			t.Errorf("%s: %q", path, got)
		}
	}
}
