// Which server a request belongs to. Used by mlx-servers.conf.
//
// Rule 1: every turn of a conversation has the same key: what it begins with, up to the first message of the user.
// Rule 2: a body that can't be read has the client's address as its key. Nothing is refused here.
// Rule 3: a second attempt goes to another server than the first.

const PROMPT_CHARACTERS = 256; // of a bare prompt: what is behind them may grow

function key(r) {
    try {
        const asked = JSON.parse(r.requestText);
        return asked.prompt_cache_key || JSON.stringify([asked.model, beginning(asked)]);
    } catch (error) {
        return r.remoteAddress;
    }
}

function beginning(asked) {
    if (!Array.isArray(asked.messages)) {
        return JSON.stringify(asked.prompt).slice(0, PROMPT_CHARACTERS);
    }
    const first = asked.messages.findIndex((message) => message.role === 'user');
    return asked.messages.slice(0, first + 1).map((message) => [message.role, message.content]);
}

// The server after the one that refused, in the order of $servers.
function another(r) {
    const servers = r.variables.servers.split(' ');
    const refused = r.variables.upstream_addr.split(', ').pop();
    return servers[(servers.indexOf(refused) + 1) % servers.length];
}

export default { key, another };
