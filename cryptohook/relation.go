package cryptohook

import (
	"encoding/json"
	"reflect"

	"maunium.net/go/mautrix/event"
)

// relationKey is where a message says what it answers or replaces. In an encrypted event it stands outside, for servers to read.
// https://spec.matrix.org/v1.16/client-server-api/#forming-relationships-between-events
const relationKey = "m.relates_to"

// relateAsSent gives a decrypted event the relation that it was sent with. Clients look nowhere else; mautrix prefers one inside, if there is
// one. A message that passes for an edit here, and is one of its own to everybody else, would not be answered.
func relateAsSent(decrypted, sent *event.Event) error {
	outside, related := sent.Content.Raw[relationKey]
	inside, claims := decrypted.Content.Raw[relationKey]
	if related == claims && reflect.DeepEqual(outside, inside) {
		return nil
	}
	content := decrypted.Content.GetRaw()
	delete(content, relationKey)
	if related {
		content[relationKey] = outside
	}
	raw, err := json.Marshal(content)
	if err != nil {
		return err
	}
	decrypted.Content = event.Content{VeryRaw: raw, Raw: content}
	if decrypted.Content.ParseRaw(decrypted.Type) != nil {
		decrypted.Content.Parsed = nil
	}
	return nil
}
