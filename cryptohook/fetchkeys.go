package cryptohook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/rs/zerolog"
	"maunium.net/go/mautrix"
	"maunium.net/go/mautrix/id"
)

// Asking for users' keys. mautrix's own FetchKeys still works, and what it asks passes the transport too; but it checks every signature that
// was checked there once more, one after the other, and commits what it stores piece by piece.

// errQueryUnread says that whoever is between the client and the hook's transport hides what a key query asks.
var errQueryUnread = errors.New("the key query has not come through the hook's transport with its body")

// takingKey marks the context of a key query whose answer is stored for mautrix too.
type takingKey struct{}

// taken is what became of such an answer.
type taken struct {
	read bool
	// answered are the users about whom there was an answer.
	answered []id.UserID
}

// takenIn gives where the answer to a key query is to be noted; nil if mautrix stores it for itself.
func takenIn(ctx context.Context) *taken {
	t, _ := ctx.Value(takingKey{}).(*taken)
	return t
}

// fetchKeys asks for the keys that users publish, and stores what the answer proves, for us and for mautrix. It gives those about whom there
// was an answer. An error is one of the request, or of the database.
func (h *Hook) fetchKeys(ctx context.Context, users []id.UserID) (answered map[id.UserID]struct{}, err error) {
	if h.mach.DeleteKeysOnDeviceDelete {
		return h.fetchKeysByMautrix(ctx, users)
	}
	answered = make(map[id.UserID]struct{}, len(users))
	if ourselves := h.mach.Client.UserID; h.mach.CrossSigningKeys == nil && slices.Contains(users, ourselves) {
		// What mautrix remembers of a public identity whose secret keys it does not have, only it can forget. It does so without a lock, beside
		// those who encrypt; with the secret keys it would come to the same again.
		users = slices.DeleteFunc(slices.Clone(users), func(userID id.UserID) bool { return userID == ourselves })
		if answered, err = h.fetchKeysByMautrix(ctx, []id.UserID{ourselves}); err != nil {
			return nil, err
		}
	}
	if len(users) > 0 {
		err = h.fetchAndStore(ctx, users, answered)
	}
	return answered, err
}

// fetchAndStore is fetchKeys without mautrix. It adds those about whom there was an answer.
func (h *Hook) fetchAndStore(ctx context.Context, users []id.UserID, answered map[id.UserID]struct{}) error {
	asked := make(mautrix.DeviceKeysRequest, len(users))
	for _, userID := range users {
		asked[userID] = mautrix.DeviceIDList{}
	}
	var took taken
	answer, err := h.mach.Client.QueryKeys(context.WithValue(ctx, takingKey{}, &took), &mautrix.ReqQueryKeys{DeviceKeys: asked, Timeout: queryTimeout})
	if err != nil {
		return fmt.Errorf("failed to ask for keys: %w", err)
	}
	for server, fault := range answer.Failures {
		zerolog.Ctx(ctx).Warn().Interface("query_error", fault).Str("server", server).Msg("This homeserver did not answer a key query")
	}
	if !took.read {
		return errQueryUnread
	}
	for _, userID := range took.answered {
		answered[userID] = struct{}{}
	}
	return nil
}

// queryTimeout is how long our homeserver is to wait for others, in milliseconds. It is mautrix's.
const queryTimeout = 10_000

func (h *Hook) fetchKeysByMautrix(ctx context.Context, users []id.UserID) (answered map[id.UserID]struct{}, err error) {
	devices, err := h.mach.FetchKeys(ctx, users, true)
	if err != nil {
		return nil, err
	}
	answered = make(map[id.UserID]struct{}, len(devices))
	for userID := range devices {
		answered[userID] = struct{}{}
	}
	return answered, nil
}

// done notes whose keys were stored, and gives what the client is to see of the answer: the homeservers that did not answer.
func (t *taken) done(users []*publishedUser, answer *keyQuery) ([]byte, error) {
	t.read = true
	for _, user := range users {
		t.answered = append(t.answered, user.userID)
	}
	return json.Marshal(map[string]any{"failures": answer.Failures})
}
