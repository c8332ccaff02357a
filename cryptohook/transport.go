package cryptohook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/event"

	"sendertrust/internal/faultpoint"
)

// transport stands between the client and the network. It is the barrier of the unit of work, it reads every /keys/query
// answer whoever asked, and it can make a /sync answer readable that holds a malformed event.
type transport struct {
	base http.RoundTripper
	hook *Hook
	// lenientSync makes the next /sync answer lose the events that cannot be parsed, instead of being unreadable as a whole.
	lenientSync atomic.Bool
}

var errNetworkWhileReceiving = errors.New("a room key may not cause a request while it is being received")

// maxInspected bounds the answers that are read whole here, in bytes. It is mautrix's own bound.
var maxInspected = int64(mautrix.DefaultResponseSizeLimit)

func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if isReceiving(req.Context()) {
		return nil, errNetworkWhileReceiving
	}
	path := req.URL.Path
	if strings.Contains(path, "/sendToDevice/") {
		if err := t.hook.uow.flush(req.Context()); err != nil {
			return nil, fmt.Errorf("refusing to send an Olm message whose ratchet could not be stored: %w", err)
		}
		faultpoint.Reach("sending keys")
		defer faultpoint.Reach("sent keys")
	}
	keyQuery := strings.HasSuffix(path, "/keys/query")
	var number uint64
	if keyQuery {
		number = t.hook.questions.begin()
		defer t.hook.questions.end()
	}
	resp, err := t.base.RoundTrip(req)
	if keyQuery {
		t.hook.counters.keyQuery(err == nil && resp.StatusCode == http.StatusOK)
	}
	if err != nil || resp.StatusCode != http.StatusOK {
		return resp, err
	}
	switch {
	case keyQuery:
		return replaceBody(resp, func(body []byte) ([]byte, error) { return t.hook.observeKeyQuery(req, number, body) })
	case strings.HasSuffix(path, "/sync") && t.lenientSync.Swap(false):
		return replaceBody(resp, func(body []byte) ([]byte, error) { return dropMalformedEvents(req.Context(), body) })
	}
	return resp, nil
}

func replaceBody(resp *http.Response, inspect func([]byte) ([]byte, error)) (*http.Response, error) {
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxInspected+1))
	_ = resp.Body.Close()
	if err == nil && int64(len(body)) > maxInspected {
		err = mautrix.ErrResponseTooLong
	}
	if err == nil {
		body, err = inspect(body)
	}
	if err != nil {
		return nil, err
	}
	resp.Body = io.NopCloser(bytes.NewReader(body))
	resp.ContentLength = int64(len(body))
	return resp, nil
}

// dropMalformedEvents takes the events out of a /sync answer that mautrix cannot parse, so that one of them does not hold up
// all the others. What is no JSON at all stays as it is.
func dropMalformedEvents(ctx context.Context, body []byte) ([]byte, error) {
	var answer any
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber()
	if err := decoder.Decode(&answer); err != nil {
		return body, nil
	}
	return json.Marshal(keepParsable(ctx, answer))
}

func keepParsable(ctx context.Context, value any) any {
	object, ok := value.(map[string]any)
	if !ok {
		return value
	}
	for key, member := range object {
		list, isList := member.([]any)
		if !isList || !strings.EqualFold(key, "events") { // as encoding/json finds it
			object[key] = keepParsable(ctx, member)
			continue
		}
		kept := make([]any, 0, len(list))
		for _, item := range list {
			raw, err := json.Marshal(item)
			if err == nil {
				err = json.Unmarshal(raw, new(event.Event))
			}
			if err != nil {
				zerolog.Ctx(ctx).Warn().Err(err).Msg("Dropping an event that cannot be parsed")
				continue
			}
			kept = append(kept, item)
		}
		object[key] = kept
	}
	return object
}
